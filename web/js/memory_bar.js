// The card's memory as one horizontal bar in SVG. Widths are percentages, so the bar fits any container.

const SVG = "http://www.w3.org/2000/svg";

export const HEIGHT = 24;
const TOP = 4;
const BAR = HEIGHT - 2 * TOP;

// Okabe and Ito's colours: distinct for all kinds of colour vision, and visible on dark and light backgrounds.
// Green looks like vermilion to some people, so it is hatched as well.
export const COLOURS = { other: "#767676", residents: "#0072b2", window: "#d55e00", activations: "#009e73" };

// The mark of an error, on dark and on light backgrounds.
export const ALARM = "#e5484d";

// The colours of ComfyUI's own text fields, in any theme.
export const TEXT = "var(--input-text, #ddd)";
export const GROUND = "var(--comfy-input-bg, #222)";

/** An SVG element. */
export function svg(name, attributes = {}, children = []) {
  const element = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.append(...children);
  return element;
}

/**
 * The card's memory, part by part from left to right, with start and width from 0 to 1.
 * @param {object} memory Of a checked event.
 * @returns {{ whole: number, parts: object[], ceiling: number | null }} `whole` is the card's memory, or the sum of the
 *   estimates where they are more than it has.
 */
export function partsOf(memory) {
  const sizes = ["other", "residents", "window", "activations"].map((name) => [name, memory[name]]);
  const used = sizes.reduce((sum, [, size]) => sum + size, 0);
  const whole = Math.max(memory.total, used);
  let start = 0;
  const parts = [...sizes, ["free", whole - used]].map(([name, size]) => {
    const part = { name, size, start, width: size / whole };
    start += part.width;
    return part;
  });
  // What is unknown is no part.
  return { whole, parts: parts.filter(({ size }) => size !== null), ceiling: memory.ceiling ? memory.ceiling / whole : null };
}

const percent = (share) => `${share * 100}%`;

/** Stripes of the computation's colour. */
function hatch() {
  const stripes = { id: "hatch", patternUnits: "userSpaceOnUse", width: 5, height: 5, patternTransform: "rotate(45)" };
  const ground = { width: 5, height: 5, fill: COLOURS.activations, "fill-opacity": 0.3 };
  return svg("pattern", stripes, [
    svg("rect", ground),
    svg("rect", { width: 2.5, height: 5, fill: COLOURS.activations }),
  ]);
}

/** The fill of a part, on the bar and in the legend. */
export const fillOf = (name) => (name === "activations" ? "url(#hatch)" : (COLOURS[name] ?? "transparent"));

const edge = (share) =>
  svg("line", { x1: percent(share), x2: percent(share), y1: TOP, y2: TOP + BAR, stroke: GROUND });

/** A line across the bar, with a rim so that it is visible on any colour. */
function ceilingAt(share) {
  const place = { x1: percent(share), x2: percent(share), y1: 0, y2: HEIGHT };
  const rim = svg("line", { ...place, stroke: GROUND, "stroke-width": 4 });
  return [rim, svg("line", { "data-part": "ceiling", ...place, stroke: TEXT, "stroke-width": 2 })];
}

/**
 * The bar.
 * @param {object | null} memory Of a checked event; null draws an empty one.
 */
export function bar(memory) {
  const round = { y: TOP, width: "100%", height: BAR, rx: 4 };
  const outline = { ...round, fill: "none", stroke: TEXT, "stroke-opacity": memory ? 0.45 : 0.3 };
  const frame = svg("rect", { ...outline, ...(memory ? {} : { "stroke-dasharray": "3 3" }) });
  const drawing = svg("svg", { width: "100%", height: HEIGHT, style: "display: block; overflow: visible" });
  drawing.append(svg("defs", {}, [svg("clipPath", { id: "round" }, [svg("rect", round)]), hatch()]));
  if (memory === null) {
    drawing.append(frame);
    return drawing;
  }
  const { parts, ceiling } = partsOf(memory);
  const inside = svg("g", { "clip-path": "url(#round)" });
  for (const { name, start, width } of parts) {
    const place = { x: percent(start), width: percent(width), y: TOP, height: BAR };
    inside.append(svg("rect", { "data-part": name, ...place, fill: fillOf(name) }));
    if (width && name !== "free") inside.append(edge(start + width));
  }
  drawing.append(inside, frame);
  if (ceiling !== null) drawing.append(...ceilingAt(ceiling));
  return drawing;
}
