// The element on the node: bar, legend and sentences. A shadow root separates its styles from those of the page.

import { GROUND, HEIGHT, TEXT, bar, fillOf, partsOf, svg } from "./memory_bar.js";

const SWATCH = 10;
const PADDING = 8;

// Legend and three lines, so that the node keeps its height from before the first run to the result.
const MIN_HEIGHT = 176;
// Three lines and no bar.
const NOTICE_HEIGHT = 68;

/** An HTML element with inline styles. */
function html(name, style, children = []) {
  const element = document.createElement(name);
  Object.assign(element.style, style);
  element.append(...children);
  return element;
}

function swatch(name) {
  const square = { x: 0.5, y: 0.5, width: SWATCH - 1, height: SWATCH - 1, rx: 2 };
  const drawing = svg("svg", { width: SWATCH, height: SWATCH, style: "flex: none" });
  if (name === "ceiling") drawing.append(svg("rect", { x: 4, width: 2, height: SWATCH, fill: TEXT }));
  else if (name === "headroom")
    drawing.append(svg("rect", { ...square, fill: "none", stroke: TEXT, "stroke-opacity": 0.6 }));
  else drawing.append(svg("rect", { ...square, fill: fillOf(name) }));
  return drawing;
}

// Memory in use on the left, the rest on the right; each in the order of the bar.
const LEGEND = [
  ["other", "residents", "window"],
  ["activations", "headroom", "ceiling"],
];

/** The entries of the legend with their amounts as text; without memory, only the names. */
function entriesOf(memory, texts) {
  const amounts = memory ? { ...memory, headroom: partsOf(memory).headroom } : {};
  const isTold = (name) => !memory || amounts[name] || name === "headroom";
  const entry = (name) => ({ name, word: texts.say(name), size: memory ? texts.memory(amounts[name]) : "" });
  return LEGEND.map((column) => column.filter(isTold).map(entry));
}

function legendEntry({ name, word, size }) {
  const entry = html("div", { display: "flex", alignItems: "center", gap: "6px", whiteSpace: "nowrap" }, [
    swatch(name),
    html("span", { flex: 1, opacity: 0.8 }, [word]),
    html("span", { fontVariantNumeric: "tabular-nums" }, [size]),
  ]);
  entry.dataset.entry = name;
  return entry;
}

/** What one node shows. */
export class Panel {
  /** @param {() => void} onResize Called when the panel may need more room, or less. */
  constructor(onResize) {
    this.event = null;
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
   */
  show(event, texts) {
    this.event = event;
    const hasBar = event?.phase !== "foreign";
    this.least = hasBar ? MIN_HEIGHT : NOTICE_HEIGHT;
    this.content.style.minHeight = `${this.least}px`;
    const memory = event?.memory ?? null;
    const lines = event ? texts.lines(event) : [texts.say("idle")];
    if (event?.isEarlier) lines.push(texts.say("earlier"));
    this.content.style.opacity = event?.isEarlier ? "0.6" : "1";
    const legend = memory || !event ? entriesOf(memory, texts) : [];
    const total = memory ? texts.memory(memory.total) : "";
    const amounts = memory ? legend.flat().map(({ word, size }) => `${word} ${size}`) : [];
    const spoken = [...(hasBar ? [`${texts.say("memory")} ${total}`.trim(), ...amounts] : []), ...lines];
    this.element.setAttribute("aria-label", spoken.join(". "));
    this.element.dataset.phase = event?.phase ?? "idle";
    this.content.lang = texts.language;
    this.content.replaceChildren(
      ...(hasBar ? [headOf(texts.say("memory"), total), html("div", { height: `${HEIGHT}px` }, [bar(memory)])] : []),
      ...(legend.length ? [legendOf(legend)] : []),
      ...lines.map((line, index) => sentenceOf(line, event && index === 0)),
      ...progressOf(event),
    );
    this.onResize();
  }
}

const headOf = (name, total) =>
  html("div", { display: "flex", justifyContent: "space-between", marginBottom: "-3px" }, [
    html("span", { fontWeight: 600 }, [name]),
    html("span", { fontVariantNumeric: "tabular-nums" }, [total]),
  ]);

function legendOf(columns) {
  // Side by side, or one below the other if that is too wide.
  const style = { flex: "1 1 auto", display: "flex", flexDirection: "column" };
  const legend = html("div", { display: "flex", flexWrap: "wrap", columnGap: "20px" });
  legend.append(...columns.map((entries) => html("div", style, entries.map(legendEntry))));
  return legend;
}

function sentenceOf(line, isFirst) {
  const sentence = html("div", { opacity: isFirst ? 1 : 0.8, textWrap: "pretty", overflowWrap: "anywhere" }, [line]);
  sentence.dataset.line = "";
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
