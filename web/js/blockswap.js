// The memory bar on the swap node, the texts on the two others, and our section of the settings.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { foreignEvent, readEvent, textEvent } from "./event.js";
import { Panel } from "./panel.js";
import { DEFAULT_CEILING, settings } from "./settings.js";
import { TEXT_HEIGHT, showText, textField } from "./text_panel.js";
import { Texts, textsFrom } from "./texts.js";
import { Workflows, nodeAt, nodesOf } from "./workflows.js";

const NODE = "WanVideoEnhancedBlockSwap";
// As ComfyUI calls a pack: it serves this module as /extensions/FOLDER/js/blockswap.js.
const PACK = `custom_nodes.${decodeURIComponent(import.meta.url.split("/").at(-3))}`;
const EVENT = "wanvideo_enhanced_blockswap.progress";
const WIDGET = "blockswap_memory";
// ComfyUI's own widget for the text that nodes send while they run.
const TEXT_WIDGET = "$$node-text-preview";
const CEILING = "vram_threshold_percent";
const AUTO = "auto_hardware_tuning";
// What automatic tuning chooses by itself.
const CHOSEN = ["blocks_to_swap", "vace_blocks_to_swap", "num_cuda_streams", "bandwidth_target"];
const LOADER = "WanVideoModelLoader";
// The other nodes, and what stands on them before they have run.
const TEXT_NODES = {
  WanVideoEnhancedBlockSwapPlan: "plan_text",
  WanVideoEnhancedBlockSwapReport: "report_text",
  // Their former names, in saved workflows.
  WanVideoBlockSwapPlan: "plan_text",
  WanVideoBlockSwapReport: "report_text",
};
const TEXT_FIELD = "blockswap_text";

// Space around the panel, as around ComfyUI's own elements on a node.
const MARGIN = 10;

// Width of a new node: the plan takes two lines in every language.
const NEW_WIDTH = 400;
const NEW_TEXT_WIDTH = 520;

// Of a node's mode, as LiteGraph has them.
const MUTED = 2;
const BYPASSED = 4;

const workflows = new Workflows();
const panels = new WeakMap();
const labels = new WeakMap();
let texts = new Texts();
let language = "en";
let isShown = true;
let isReady = false;
// The pack of another node under this name, which ComfyUI uses instead of ours.
let otherPack = null;

const isOurs = (node) => node?.comfyClass === NODE && !otherPack;
/** The workflow's own graph, which front ends before 1.28 have as `graph` alone. */
const rootGraph = () => app.rootGraph ?? app.graph;
const setting = (id) => app.extensionManager.setting.get(id);

// The bar

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const barOf = (node) => widgetOf(node, WIDGET);
const textOf = (node) => widgetOf(node, TEXT_WIDGET);

function panelOf(node) {
  if (!panels.has(node)) {
    const panel = new Panel(() => node.setDirtyCanvas(true, true));
    forwardToCanvas(panel.element);
    panels.set(node, panel);
  }
  return panels.get(node);
}

const heightOf = (node) => panelOf(node).height + 2 * MARGIN;

function addBar(node) {
  const panel = panelOf(node);
  const height = () => heightOf(node);
  const widget = node.addDOMWidget(WIDGET, WIDGET, panel.element, {
    serialize: false,
    hideInPanel: true,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height,
    onDraw: () => panel.dim(!LiteGraph.vueNodesMode && isOff(node)),
  });
  widget.serialize = false;
  if (textOf(node)) node.removeWidget(textOf(node));
  refresh(node);
}

const isOff = (node) => node.mode === MUTED || node.mode === BYPASSED;

/** What keeps a node from working, by its name in the texts; null if nothing does. */
function noticeOf(node) {
  if (!LiteGraph.registered_node_types[LOADER]) return "no_wrapper";
  if (isOff(node)) return "bypassed";
  return node.outputs[0]?.links?.length ? null : "unconnected";
}

/** Shows an event on a node, by default its last again. */
function refresh(node, event = panelOf(node).event) {
  panelOf(node).show(event, texts, noticeOf(node));
  followTuning(node);
}

/** Greys what automatic tuning chooses by itself, and says on its label what it has chosen. */
function followTuning(node) {
  const isAuto = isOurs(node) && widgetOf(node, AUTO)?.value === true && !isLinked(node, AUTO);
  const swapped = panelOf(node).event?.plan?.swapped;
  for (const name of CHOSEN) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    if (!labels.has(widget)) labels.set(widget, widget.label);
    const own = labels.get(widget);
    const figures = { name: own || name, number: swapped };
    const isKnown = name === CHOSEN[0] && swapped !== undefined;
    widget.disabled = widget.options.disabled = isAuto;
    widget.label = isAuto ? texts.say(isKnown ? "auto_chosen" : "auto", figures) : own;
  }
}

const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

/** Calls `after` behind a callback that an object may have. */
function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    after();
    return result;
  };
}

/** Follows what the user changes on a node. */
function follow(node) {
  const again = () => refresh(node);
  chain(node, "onConfigure", again);
  // A link that is removed is gone only after the call.
  chain(node, "onConnectionsChange", () => queueMicrotask(again));
  if (widgetOf(node, AUTO)) chain(widgetOf(node, AUTO), "callback", again);
}

/** Gives a node the height that its widgets need, if it has less. Nodes 2.0 do this by themselves. */
function makeRoom(node) {
  if (!LiteGraph.vueNodesMode) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

function removeBar(node) {
  const widget = barOf(node);
  // Otherwise the front end shows a removed widget if its node leaves the graph and comes back.
  widget.hidden = true;
  node.removeWidget(widget);
  // This one is hidden; the next text makes a new one.
  if (textOf(node)) node.removeWidget(textOf(node));
  node.setSize([node.size[0], node.size[1] - heightOf(node)]);
}

function onShowBar(shown) {
  isShown = shown;
  // The first call comes before there is a graph.
  if (!isReady) return;
  for (const node of nodesOf(rootGraph())) {
    if (!isOurs(node) || Boolean(barOf(node)) === shown) continue;
    (shown ? addBar : removeBar)(node);
    makeRoom(node);
    node.setDirtyCanvas(true, true);
  }
  showEvents();
}

/** Forwards wheel and middle button, which move the canvas: the panel would otherwise consume them. */
function forwardToCanvas(element) {
  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const isMiddle = (event) => event.button === 1 || (event.buttons & 4) !== 0;
  element.addEventListener("pointerdown", (event) => isMiddle(event) && app.canvas.processMouseDown(event));
  element.addEventListener("pointermove", (event) => isMiddle(event) && app.canvas.processMouseMove(event));
  element.addEventListener("pointerup", (event) => isMiddle(event) && app.canvas.processMouseUp(event));
}

// Events

function showEvent(event) {
  const node = nodeAt(rootGraph(), event.node);
  if (!node) return;
  // Graphs of some files have one id, so that the event may be of another node.
  if (event.phase === "text") sayText(node, event.text, event.isEarlier);
  else if (isOurs(node)) refresh(node, event);
}

/** Shows all events of the open workflow again: its nodes or the language may be new. */
function showEvents() {
  for (const node of nodesOf(rootGraph())) {
    if (barOf(node)) refresh(node);
    sayText(node, "");
  }
  for (const event of workflows.eventsOf(rootGraph())) showEvent(event);
}

function onProgress({ detail }) {
  const event = readEvent(detail);
  if (event) onEvent(event);
}

function onEvent(event) {
  const kept = workflows.keep({ ...event, at: Date.now() }, rootGraph());
  if (workflows.isOpen(event, rootGraph())) showEvent(kept);
}

/** A node has run, or ComfyUI gives its last output again. */
function onExecuted({ detail }) {
  const text = detail?.output?.text;
  const node = nodeAt(rootGraph(), String(detail?.node));
  if (TEXT_NODES[node?.comfyClass] && Array.isArray(text))
    onEvent(textEvent(String(detail.node), text.join("\n")));
}

/** The user has changed the graph, by bypassing a node for example. */
function onGraphChanged() {
  for (const node of nodesOf(rootGraph())) {
    if (isOurs(node) && barOf(node) && panelOf(node).notice !== noticeOf(node)) refresh(node);
  }
}

/** A run starts; our nodes may take no part in it (bypassed, or another node's arguments are used). */
function onStart() {
  workflows.age();
  showEvents();
}

/**
 * Hides the text that ComfyUI has just put on nodes with a bar, which shows the same. The text is not removed, because
 * ComfyUI would then make a new one for every text, and each leaves something behind on its node.
 */
function onProgressText() {
  if (!isShown) return;
  for (const node of nodesOf(rootGraph())) {
    const text = isOurs(node) && textOf(node);
    if (!text) continue;
    text.hidden = text.options.hidden = true;
    // Earlier front ends save it with the workflow, and keep room for it although it is hidden.
    text.serialize = false;
    text.options.getMinHeight = text.options.getMaxHeight = () => 0;
  }
}

async function followLanguage() {
  const wanted = setting("Comfy.Locale");
  if (wanted === language) return;
  language = wanted;
  // English is built in, and is used if the server does not answer.
  const languages = wanted === "en" ? {} : await api.getCustomNodesI18n().catch(() => ({}));
  if (wanted !== language) return; // the language has changed again
  texts = textsFrom(languages, wanted);
  showEvents();
}

// The texts of the other nodes

function addText(node) {
  const widget = node.addDOMWidget(TEXT_FIELD, TEXT_FIELD, textField(), {
    serialize: false,
    hideInPanel: true,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => TEXT_HEIGHT + 2 * MARGIN,
  });
  widget.serialize = false;
  node.setSize([NEW_TEXT_WIDTH, node.computeSize()[1]]);
  sayText(node, "");
}

function sayText(node, text, isEarlier = false) {
  const field = TEXT_NODES[node.comfyClass] && widgetOf(node, TEXT_FIELD)?.element;
  if (field) showText(field, text || texts.say(TEXT_NODES[node.comfyClass]), text && !isEarlier);
}

// New nodes

/** Whether a saved node has a value for a widget, by its position or by its name. */
function hasSaved(saved, node, widget) {
  if (widget.name in (saved?.widgets_values_named ?? {})) return true;
  const position = node.widgets.filter((each) => each.serialize !== false).indexOf(widget);
  return position < (saved?.widgets_values?.length ?? 0);
}

/** Gives a new node the ceiling of the settings; a loaded or copied node then takes its saved one. */
function takeDefaultCeiling(node) {
  const widget = widgetOf(node, CEILING);
  const wanted = setting(DEFAULT_CEILING);
  if (!widget || !Number.isFinite(wanted)) return;
  const { min, max } = widget.options;
  const declared = widget.value;
  widget.value = Math.min(Math.max(wanted, min), max);
  const before = node.onConfigure;
  node.onConfigure = function (saved, ...others) {
    // A node saved without a value had the default of the node.
    if (!hasSaved(saved, this, widget)) widget.value = declared;
    return before?.call(this, saved, ...others);
  };
}

app.registerExtension({
  name: "wanvideoenhancedblockswap.memory_bar",
  settings: settings(onShowBar),
  async setup() {
    isReady = true;
    api.addEventListener("promptQueueing", () => workflows.onQueue(rootGraph()));
    api.addEventListener("status", ({ detail }) => workflows.onQueueLength(detail?.exec_info?.queue_remaining));
    api.addEventListener("execution_start", onStart);
    api.addEventListener("graphChanged", onGraphChanged);
    // For its own buttons, the front end sends that late.
    window.addEventListener("click", () => setTimeout(onGraphChanged), true);
    api.addEventListener(EVENT, onProgress);
    api.addEventListener("executed", onExecuted);
    // Runs after ComfyUI's own listener, which is added before extensions load; nothing is drawn in between.
    api.addEventListener("progress_text", onProgressText);
    await followLanguage();
  },
  beforeRegisterNodeDef(_nodeType, { name, python_module: pack }) {
    if (name === NODE) otherPack = pack && pack !== PACK ? pack : null;
  },
  nodeCreated(node) {
    if (TEXT_NODES[node.comfyClass]) addText(node);
    if (node.comfyClass !== NODE) return;
    if (otherPack) {
      panelOf(node).event = foreignEvent(otherPack, PACK);
    } else {
      takeDefaultCeiling(node);
      follow(node);
      followTuning(node);
    }
    if (!isShown && !otherPack) return;
    addBar(node);
    node.setSize([Math.max(node.size[0], NEW_WIDTH), node.size[1]]);
    makeRoom(node);
  },
  /** A height that the classic renderer has saved has room for widgets that Nodes 2.0 hide. */
  loadedGraphNode(node) {
    if (isOurs(node) && LiteGraph.vueNodesMode) node.setSize([node.size[0], 0]);
  },
  async afterConfigureGraph() {
    showEvents();
    await followLanguage();
  },
});
