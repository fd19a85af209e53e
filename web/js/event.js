// What Python tells of a run, as far as it is well formed: a part that is not is null, and the rest is shown without it.

const PHASES = new Set(["adopting", "sampling", "done", "stopped", "off"]);

const isAmount = (value) => typeof value === "number" && Number.isFinite(value) && value >= 0;

/** The object with these amounts, and each of `optional` that is none as null; null where an amount is missing. */
function amounts(part, required, optional = []) {
  if (part === null || typeof part !== "object" || !required.every((name) => isAmount(part[name]))) return null;
  const known = Object.fromEntries(required.map((name) => [name, part[name]]));
  for (const name of optional) known[name] = isAmount(part[name]) ? part[name] : null;
  return known;
}

function planOf(part) {
  const plan = amounts(part, ["blocks", "swapped", "slots", "free"], ["stall_ms", "forward_ms"]);
  return plan && { ...plan, over_ceiling: part.over_ceiling === true };
}

/**
 * The event's detail, checked.
 * @returns {object | null} null where it is none of ours: no node, or a phase that a newer Python may know.
 */
export function readEvent(detail) {
  if (detail === null || typeof detail !== "object" || !PHASES.has(detail.phase)) return null;
  if (typeof detail.node !== "string" && typeof detail.node !== "number") return null;
  const memory = amounts(detail.memory, ["total", "other", "residents", "window", "ceiling"], ["activations"]);
  return {
    node: String(detail.node),
    workflow: typeof detail.workflow === "string" ? detail.workflow : null,
    phase: detail.phase,
    text: typeof detail.text === "string" ? detail.text : "",
    memory: memory?.total ? memory : null,
    plan: planOf(detail.plan),
    adopt: amounts(detail.adopt, ["placed", "all", "pinned"]),
    run: amounts(detail.run, ["forwards", "streamed"], ["forward_ms", "stall_ms", "copy_bytes_per_s"]),
  };
}
