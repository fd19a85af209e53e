// Our section of ComfyUI's settings dialog. English is here; the other languages come from locales/, by these ids.

const SECTION = "WanVideo Enhanced BlockSwap";

// Unique names: the dialog translates "Node" or "Memory" for all packages together.
const ON_THE_NODE = "WanVideo BlockSwap node";
const HOST_MEMORY = "WanVideo BlockSwap host memory";

export const SHOW_BAR = "WanVideoEnhancedBlockSwap.ShowBar";
export const DEFAULT_CEILING = "WanVideoEnhancedBlockSwap.DefaultCeiling";

/**
 * The settings, for registerExtension.
 * @param {(isShown: boolean) => void} onShowBar Called with the value at the start and at each change.
 */
export const settings = (onShowBar) => [
  {
    id: SHOW_BAR,
    category: [SECTION, ON_THE_NODE, "ShowBar"],
    name: "Show the memory bar",
    tooltip:
      "A bar on the node shows what VRAM is used for, with the plan below it. Off: the text alone, while it runs.",
    type: "boolean",
    defaultValue: true,
    sortOrder: 40,
    onChange: onShowBar,
  },
  {
    id: DEFAULT_CEILING,
    category: [SECTION, ON_THE_NODE, "DefaultCeiling"],
    name: "vram_threshold_percent of new nodes",
    tooltip: "What a node starts with when you add it. Nodes in workflows, and copies, keep their own value.",
    type: "slider",
    attrs: { min: 30, max: 90, step: 5 },
    defaultValue: 50,
    sortOrder: 30,
  },
  {
    id: "WanVideoEnhancedBlockSwap.KeepHostSlabs",
    category: [SECTION, HOST_MEMORY, "KeepHostSlabs"],
    name: "Keep weights in locked RAM for the next run",
    tooltip:
      "The next run of the same model starts sooner. They are released when RAM is nearly full. Off: they are released after each run.",
    type: "boolean",
    defaultValue: true,
    sortOrder: 20,
  },
  {
    id: "WanVideoEnhancedBlockSwap.PinBudgetGiB",
    category: [SECTION, HOST_MEMORY, "PinBudgetGiB"],
    name: "Locked RAM, at most (GB)",
    tooltip:
      "How much RAM all models together may lock in place for fast copies; the system's own limit holds as well. 0: as much as the system allows.",
    type: "number",
    attrs: { min: 0, max: 1024, step: 1 },
    defaultValue: 0,
    // An empty field gives null.
    migrateDeprecatedValue: (value) => value ?? 0,
    sortOrder: 10,
  },
];
