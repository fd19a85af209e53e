// Checks the event that Python sends about a run: a malformed part becomes null, and the rest is shown without it.

// The last is of the text nodes, and stored as the others are.
const PHASES = new Set(["adopting", "sampling", "done", "stopped", "failed", "off", "text"]);

const textOf = (value) => (typeof value === "string" ? value : "");

const isAmount = (value) => typeof value === "number" && Number.isFinite(value) && value >= 0;

/** The object with these amounts; null if a required one is missing. A missing `optional` amount is null. */
function amounts(part, required, optional = []) {
  if (!part || typeof part !== "object" || !required.every((name) => isAmount(part[name]))) return null;
  const known = Object.fromEntries(required.map((name) => [name, part[name]]));
  for (const name of optional) known[name] = isAmount(part[name]) ? part[name] : null;
  return known;
}

function planOf(part) {
  const plan = amounts(part, ["blocks", "swapped"], ["parts", "stall_ms", "forward_ms"]);
  return plan && { ...plan, over_ceiling: part.over_ceiling === true };
}

function runOf(part) {
  const run = amounts(part, ["passes"], ["step", "steps", "forward_ms", "stall_ms", "each_ms", "ran_out_with"]);
  const movers = Array.isArray(part?.movers) ? part.movers.filter((name) => typeof name === "string") : [];
  return run && { ...run, others: textOf(part.others), movers, each: eachOf(part) };
}

/** What a time is of. */
const eachOf = ({ each }) => (each === "pass" ? "pass" : "step");

function hintOf(part) {
  const hint = amounts(part, ["free_bytes", "percent", "blocks", "saved_ms"]);
  return hint && { ...hint, each: eachOf(part) };
}

/**
 * The event's detail, checked.
 * @returns {object | null} null if there is no node, or an unknown phase (of a newer Python).
 */
export function readEvent(detail) {
  if (detail === null || typeof detail !== "object" || !PHASES.has(detail.phase)) return null;
  if (typeof detail.node !== "string" && typeof detail.node !== "number") return null;
  const memory = amounts(detail.memory, ["total", "other", "residents", "window", "ceiling"], ["activations"]);
  return {
    node: String(detail.node),
    workflow: typeof detail.workflow === "string" ? detail.workflow : null,
    phase: detail.phase,
    text: textOf(detail.text),
    memory: memory?.total ? memory : null,
    plan: planOf(detail.plan),
    adopt: amounts(detail.adopt, ["placed", "all", "pinned"]),
    run: runOf(detail.run),
    hint: hintOf(detail.hint),
    model: textOf(detail.model),
    error: textOf(detail.error),
  };
}

/** What a node of ours for texts has said. */
export const textEvent = (node, text) => ({ node, workflow: null, phase: "text", text });

/** What is shown on a node that another pack has under our node's name: no run of ours. */
export function foreignEvent(theirs, ours) {
  const folder = (pack) => pack.replace(".", "/");
  return { phase: "foreign", text: "", memory: null, theirs: folder(theirs), ours: folder(ours) };
}
