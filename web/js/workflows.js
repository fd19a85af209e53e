// Which node an event is for, and the last event of each node: a workflow's nodes are made anew whenever its tab is opened.

/** The node with this execution id ("7:12" is node 12 inside the subgraph of node 7), or null. */
export function nodeAt(graph, executionId) {
  // An id may hold a colon itself, as those of workflows that were opened from the API's format.
  for (let end = executionId.indexOf(":"); end !== -1; end = executionId.indexOf(":", end + 1)) {
    const subgraph = graph.getNodeById(executionId.slice(0, end))?.subgraph;
    const inside = subgraph ? nodeAt(subgraph, executionId.slice(end + 1)) : null;
    if (inside) return inside;
  }
  return graph.getNodeById(executionId) ?? null;
}

/** Every node of the workflow, those in subgraphs too. */
export function* nodesOf(rootGraph) {
  for (const graph of [rootGraph, ...rootGraph.subgraphs.values()]) yield* graph.nodes;
}

/** The last events of the workflows of this page. */
export class Workflows {
  #events = new Map();
  #queued = new Set();

  /** Something of this workflow is about to be queued. */
  onQueue(rootGraph) {
    this.#queued.add(rootGraph.id);
  }

  /** @param {number} remaining How much the server still has to do for anybody. */
  onQueueLength(remaining) {
    if (remaining === 0) this.#queued.clear();
  }

  /**
   * Whether an event is for the workflow that is open. One that does not tell its own is, unless only another is queued.
   */
  isOpen(event, rootGraph) {
    if (event.workflow !== null) return event.workflow === rootGraph.id;
    return this.#queued.size !== 1 || this.#queued.has(rootGraph.id);
  }

  /** Keeps an event for the workflow that it is for. */
  keep(event, rootGraph) {
    const queued = this.isOpen(event, rootGraph) ? rootGraph.id : this.#queued.values().next().value;
    const workflow = event.workflow ?? queued;
    if (!this.#events.has(workflow)) this.#events.set(workflow, new Map());
    const events = this.#events.get(workflow);
    // The newest comes last: a node of a subgraph that is used twice has two ids.
    events.delete(event.node);
    events.set(event.node, event);
  }

  /** Something is being executed: what there is to show is of an earlier run, until an event comes. */
  age() {
    for (const events of this.#events.values()) for (const event of events.values()) event.isEarlier = true;
  }

  /** The last event of each node of a workflow, the newest last. */
  eventsOf(rootGraph) {
    return [...(this.#events.get(rootGraph.id)?.values() ?? [])];
  }
}
