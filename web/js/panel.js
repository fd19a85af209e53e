// The element on the node: bar, legend and sentences. A shadow root separates its styles from those of the page.

import { ALARM, COLOURS, GROUND, HEIGHT, TEXT, bar, fillOf, partsOf, svg } from "./memory_bar.js";

const SWATCH = 10;
const PADDING = 8;

// Legend and three lines, so that the node keeps its height from before the first run to the result.
const MIN_HEIGHT = 176;
// Three lines and no bar.
const NOTICE_HEIGHT = 68;

/** An HTML element with inline styles. */
export function html(name, style, children = []) {
  const element = document.createElement(name);
  Object.assign(element.style, style);
  element.append(...children);
  return element;
}

function swatch(name) {
  const square = { x: 0.5, y: 0.5, width: SWATCH - 1, height: SWATCH - 1, rx: 2 };
  const drawing = svg("svg", { width: SWATCH, height: SWATCH, style: "flex: none" });
  if (name === "ceiling") drawing.append(svg("rect", { x: 4, width: 2, height: SWATCH, fill: TEXT }));
  else if (name === "free") drawing.append(svg("rect", { ...square, fill: "none", stroke: TEXT, "stroke-opacity": 0.6 }));
  else drawing.append(svg("rect", { ...square, fill: fillOf(name) }));
  return drawing;
}

// What holds the model on the left, the rest on the right; each in the order of the bar.
const LEGEND = [
  ["other", "residents", "window"],
  ["activations", "free"],
];

// Phases after a run: its memory is free again.
const ENDED = new Set(["done", "stopped", "failed"]);

// The hover text of each part.
const TIPS = {
  other: "tip_other",
  residents: "tip_residents",
  window: "tip_window",
  activations: "tip_activations",
  free: "tip_free",
  ceiling: "tip_ceiling",
};

/** The entries of the legend with their amounts as text; without memory, only the names. */
function entriesOf(memory, texts) {
  const parts = memory && partsOf(memory).parts;
  const entry = (name) => {
    const size = parts?.find((part) => part.name === name)?.size;
    // What stays free is known only if the computation is.
    const isTold = !parts || size || (name === "free" && memory.activations !== null);
    return isTold ? [{ name, word: texts.say(name), size: parts ? texts.memory(size, memory.total) : "" }] : [];
  };
  return LEGEND.map((column) => column.flatMap(entry));
}

/** The limit as a share of the card, which is no part of the sum. */
const limitOf = (memory, texts) =>
  memory?.ceiling
    ? { name: "ceiling", word: texts.say("ceiling"), size: texts.wholePercent.format(memory.ceiling / memory.total) }
    : null;

/** The card's memory in words: where the estimates are more than it has, their sum stands before it. */
function totalOf(memory, texts) {
  const { whole } = partsOf(memory);
  const [used, total] = [texts.memory(whole), texts.memory(memory.total)];
  return used === total ? total : texts.say("of", { used, total });
}

function legendEntry({ name, word, size }, tip) {
  const entry = html("div", { display: "flex", alignItems: "center", gap: "6px", whiteSpace: "nowrap" }, [
    swatch(name),
    html("span", { flex: 1, opacity: 0.8 }, [word]),
    html("span", { fontVariantNumeric: "tabular-nums" }, [size]),
  ]);
  entry.dataset.entry = name;
  entry.title = tip;
  return entry;
}

/** What one node shows. */
export class Panel {
  /** @param {() => void} onResize Called when the panel may need more room, or less. */
  constructor(onResize) {
    this.event = this.notice = null;
    this.least = MIN_HEIGHT;
    this.onResize = onResize;
    this.element = document.createElement("div");
    this.element.setAttribute("role", "img");
    this.content = html("div", {
      position: "relative",
      boxSizing: "border-box",
      padding: `${PADDING}px 10px`,
      borderRadius: "8px",
      overflow: "hidden", // the progress along the edge follows its round corners
      background: GROUND,
      color: TEXT,
      font: "12px/1.4 Inter, system-ui, sans-serif",
      display: "flex",
      flexDirection: "column",
      gap: "5px",
    });
    this.element.attachShadow({ mode: "open" }).append(this.content);
    new ResizeObserver(onResize).observe(this.content);
  }

  /** Height of the panel; the minimum while it has no width on the page. */
  get height() {
    return this.element.offsetWidth ? Math.max(this.least, this.content.offsetHeight) : this.least;
  }

  /**
   * Shows an event.
   * @param {object | null} event Checked; null before the first run.
   * @param {import("./texts.js").Texts} texts
   * @param {string | null} notice What keeps the node from working, by its name in the texts.
   */
  show(event, texts, notice = null) {
    [this.event, this.notice] = [event, notice];
    const phase = event?.phase ?? "idle";
    const hasBar = phase !== "foreign";
    this.least = hasBar ? MIN_HEIGHT : NOTICE_HEIGHT;
    this.content.style.minHeight = `${this.least}px`;
    const memory = event?.memory ?? null;
    const isPast = Boolean(event?.isEarlier);
    const shownNotice = !event || isPast || ENDED.has(phase) ? notice : null;
    const lines = shownNotice ? [texts.say(shownNotice)] : [];
    if (event && shownNotice !== "bypassed") lines.push(...texts.lines(event));
    else if (!shownNotice) lines.push(texts.say("idle"));
    const main = event?.before && !shownNotice ? 1 : 0; // the line that is not pale
    const note = isPast ? texts.earlier(event.at) : noteOf(phase, memory, texts);
    const legend = memory || !event ? entriesOf(memory, texts) : [];
    const limit = limitOf(memory, texts);
    const head = [`${texts.say("memory")} ${memory ? totalOf(memory, texts) : ""}`.trim(), note].filter(Boolean);
    const amounts = memory ? [...legend.flat(), ...(limit ? [limit] : [])] : [];
    const spoken = [...(hasBar ? [...head, ...amounts.map(({ word, size }) => `${word} ${size}`)] : []), ...lines];
    this.element.setAttribute("aria-label", spoken.join(". "));
    this.element.dataset.phase = phase;
    this.element.dataset.notice = shownNotice ?? "";
    this.content.lang = texts.language;
    this.content.style.opacity = isPast ? "0.7" : "1";
    const tipOf = (name) => texts.say(TIPS[name]);
    // After a run the memory is free again, so what it was used for is pale.
    const pale = { opacity: isPast || ENDED.has(phase) ? 0.5 : 1 };
    const place = { position: "relative", height: `${HEIGHT}px`, ...pale };
    const figures = [html("div", place, [bar(memory), ...(memory ? zonesOf(memory, tipOf) : [])])];
    if (legend.length) figures.push(legendOf(legend, tipOf, pale.opacity < 1 ? 0.75 : 1));
    const hint = event?.hint ? texts.hint(event.hint) : null;
    const kindOf = (line, index) => (line === hint ? "hint" : index < main ? "done" : phase);
    this.content.replaceChildren(
      ...(hasBar ? [headOf(head, limit, tipOf), ...figures] : []),
      ...lines.map((line, index) => sentenceOf(line, event && index === main, kindOf(line, index))),
      ...progressOf(event),
    );
    this.onResize();
  }

  /** Shows whether the node takes part in a run. */
  dim(isOff) {
    this.element.style.opacity = isOff ? "0.4" : "";
  }
}

/** Where the parts of the bar have their hover texts. SVG's own, `title`, keeps a removed node in Chromium's memory. */
function zonesOf(memory, tipOf) {
  const { parts, ceiling } = partsOf(memory);
  const limit = ceiling === null ? [] : [{ name: "ceiling", start: ceiling, width: 0 }];
  return [...parts, ...limit].map(({ name, start, width }) => {
    const area = { top: 0, bottom: 0, left: `calc(${start * 100}% - 2px)`, width: `calc(${width * 100}% + 4px)` };
    const zone = html("div", { position: "absolute", ...area });
    zone.dataset.zone = name;
    zone.title = tipOf(name);
    return zone;
  });
}

function headOf([name, note], limit, tipOf) {
  const head = html("div", { display: "flex", gap: "8px", marginBottom: "-3px", whiteSpace: "nowrap" }, [
    html("span", { fontWeight: 600 }, [name]),
    html("span", { flex: 1, opacity: 0.8 }, note ? [note] : []),
  ]);
  head.dataset.head = "";
  if (limit) head.append(legendEntry(limit, tipOf("ceiling")));
  return head;
}

function legendOf(columns, tipOf, opacity) {
  // Side by side, or one below the other if that is too wide.
  const style = { flex: "1 1 auto", display: "flex", flexDirection: "column" };
  const legend = html("div", { display: "flex", flexWrap: "wrap", columnGap: "20px", opacity });
  const entries = (column) => column.map((entry) => legendEntry(entry, tipOf(entry.name)));
  legend.append(...columns.map((column) => html("div", style, entries(column))));
  return legend;
}

/** What stands beside the name of the bar; empty during a run. */
function noteOf(phase, memory, texts) {
  if (memory) return ENDED.has(phase) ? texts.say("during") : "";
  return { failed: texts.say("failed"), off: texts.say("passes") }[phase] ?? "";
}

// The colour of the edge that marks a sentence.
const EDGES = { hint: COLOURS.window, failed: ALARM };

function sentenceOf(line, isFirst, kind) {
  const colour = EDGES[kind];
  const edge = colour ? { borderLeft: `2px solid ${colour}`, paddingLeft: "6px" } : {};
  const style = { opacity: isFirst || colour ? 1 : 0.8, textWrap: "pretty", overflowWrap: "anywhere", ...edge };
  const sentence = html("div", style, [line]);
  sentence.dataset.line = colour ? kind : "";
  return sentence;
}

/** A thin bar along the lower edge while weights are placed. */
function progressOf(event) {
  if (event?.phase !== "adopting" || !event.adopt?.all) return [];
  const share = Math.min(event.adopt.placed / event.adopt.all, 1);
  const edge = { position: "absolute", left: 0, bottom: 0, height: "3px" };
  const ground = html("div", { ...edge, width: "100%", background: TEXT, opacity: 0.2 });
  const progress = html("div", { ...edge, width: `${share * 100}%`, background: TEXT });
  progress.dataset.progress = "";
  return [ground, progress];
}
