// Finds the node of an event, and keeps the last event of each node: opening a tab makes a workflow's nodes again.

import { readEvent } from "./event.js";

/** The node with this execution id ("7:12" is node 12 inside the subgraph of node 7), or null. */
export function nodeAt(graph, executionId) {
  // An id may contain a colon, as in workflows that were opened from the API's format.
  for (let end = executionId.indexOf(":"); end !== -1; end = executionId.indexOf(":", end + 1)) {
    const subgraph = graph.getNodeById(executionId.slice(0, end))?.subgraph;
    const inside = subgraph ? nodeAt(subgraph, executionId.slice(end + 1)) : null;
    if (inside) return inside;
  }
  return graph.getNodeById(executionId) ?? null;
}

/** Every node of the workflow, also in subgraphs. */
export function* nodesOf(rootGraph) {
  for (const graph of [rootGraph, ...rootGraph.subgraphs.values()]) yield* graph.nodes;
}

const STORE = "WanVideoEnhancedBlockSwap.lastRuns";
const MOST_STORED = 50;
const RESULTS = new Set(["done", "stopped", "failed", "off", "text"]);

/** What is stored: the last results of this browser's runs, the newest last. */
function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    return Array.isArray(found) ? found : [];
  } catch {
    return []; // storage is blocked, or holds something else
  }
}

/** What another model has come to in the same prompt, such as the first of two experts; null without one. */
function resultBefore(last, { model }) {
  if (!last || last.isEarlier || !last.model || !model) return null;
  if (last.model === model) return last.before;
  return last.run ? { ...last, before: null } : null;
}

/** The last events of the workflows of this page, and the last results from before it was loaded. */
export class Workflows {
  #events = new Map();
  #queued = new Set();

  constructor() {
    for (const detail of stored()) {
      const event = readEvent(detail);
      const isWhole = event?.workflow && RESULTS.has(event.phase) && Number.isFinite(detail.at);
      const before = readEvent(detail?.before);
      if (isWhole) this.#put(event.workflow, { ...event, before, at: detail.at, isEarlier: true });
    }
  }

  /** A prompt of this workflow is about to be queued. */
  onQueue(rootGraph) {
    this.#queued.add(rootGraph.id);
  }

  /** @param {number} remaining Prompts in the server's queue, of all clients. */
  onQueueLength(remaining) {
    if (remaining === 0) this.#queued.clear();
  }

  /**
   * Whether an event is for the open workflow. An event without a workflow is, unless only another workflow is queued.
   */
  isOpen(event, rootGraph) {
    if (event.workflow !== null) return event.workflow === rootGraph.id;
    return this.#queued.size !== 1 || this.#queued.has(rootGraph.id);
  }

  /** Keeps an event for its workflow, with the result of the model that the node ran before, and returns it. */
  keep(event, rootGraph) {
    const queued = this.isOpen(event, rootGraph) ? rootGraph.id : this.#queued.values().next().value;
    const workflow = event.workflow ?? queued;
    const kept = { ...event, before: resultBefore(this.#events.get(workflow)?.get(event.node), event) };
    this.#put(workflow, kept);
    if (RESULTS.has(event.phase)) this.#store({ ...kept, workflow });
    return kept;
  }

  #put(workflow, event) {
    if (!this.#events.has(workflow)) this.#events.set(workflow, new Map());
    const events = this.#events.get(workflow);
    // The newest comes last: a node of a subgraph that is used twice has two ids.
    events.delete(event.node);
    events.set(event.node, event);
  }

  /** Stores a result; other pages of this browser store theirs as well. */
  #store(event) {
    const others = stored().filter((each) => each?.node !== event.node || each?.workflow !== event.workflow);
    try {
      localStorage.setItem(STORE, JSON.stringify([...others, event].slice(-MOST_STORED)));
    } catch {
      // Storage is blocked or full: the result is lost when the page is loaded again.
    }
  }

  /** A prompt starts: the kept events are of an earlier run, until new ones come. */
  age() {
    for (const events of this.#events.values()) for (const event of events.values()) event.isEarlier = true;
  }

  /** The last event of each node of a workflow, the newest last. */
  eventsOf(rootGraph) {
    return [...(this.#events.get(rootGraph.id)?.values() ?? [])];
  }
}
