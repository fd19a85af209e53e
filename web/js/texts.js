// Words and numbers in the language of the user interface. English is here; the other languages come from locales/.

// A figure is in square brackets, because the front end's own translations interpret braces, @ and |.
export const ENGLISH = {
  memory: "VRAM",
  of: "[used] of [total]",
  during: "during the run",
  earlier: "earlier run, [time]",
  failed: "failed",
  passes: "node not in use",
  idle: "The plan appears here when the sampler starts.",
  unconnected: "Not connected: connect block_swap_args to WanVideo Model Loader.",
  bypassed: "This node is bypassed or muted: nothing is swapped.",
  no_wrapper:
    "WanVideoWrapper is not installed: install ComfyUI-WanVideoWrapper with the Manager, then restart ComfyUI.",
  other: "other use",
  residents: "blocks on the GPU",
  window: "room for streaming",
  activations: "computation",
  free: "free",
  ceiling: "threshold",
  tip_other: "VRAM in use by other programs and models. Close them to make room for blocks.",
  tip_residents:
    "Blocks that stay in VRAM. If the GPU waits for copies, raise vram_threshold_percent to keep more of them.",
  tip_window:
    "Room for the blocks that stream, a few at a time. If the GPU waits for copies, raise vram_threshold_percent so that fewer stream.",
  tip_activations: "VRAM for computing the video. Fewer frames or a smaller picture need less.",
  tip_free:
    "VRAM that stays free while the sampler runs. If the GPU waits for copies, raise vram_threshold_percent to fill it with blocks.",
  tip_ceiling:
    "The place of vram_threshold_percent: weights should end before it, the computation may go beyond it.",
  sentence: "[text].",
  then: "[one]; [other]",
  and: "[one], [other]",
  plan: "[stay] blocks on the GPU, [swapped] streaming",
  plan_parts: "[plan], with [parts] other parts of the model",
  plan_all: "all [blocks] blocks on the GPU",
  never_expected: "expected: the GPU never waits",
  waits_expected: "expected: the GPU waits [share] of the time for copies",
  over_ceiling: "this is more VRAM than is left for them",
  placing: "Preparing the weights, on the GPU and in RAM: [placed] of [all]",
  ran_out: "VRAM ran out with [blocks] blocks on the GPU, so the step was repeated with less VRAM",
  first: "The first step is running",
  step: "Step [number]",
  step_of: "Step [number] of [steps]",
  pass: "Pass [number] of the model",
  done_steps: "Done after [number] steps",
  done_passes: "Done after [number] passes of the model",
  stopped_steps: "Stopped after [number] steps",
  stopped_passes: "Stopped after [number] passes of the model",
  of_model: "[model]: [text]",
  details: "[head]: [list]",
  takes: "[time] [each]",
  never_waited: "the GPU never waited",
  waited: "the GPU waited [share] of the time for copies",
  done: "[what] VRAM is released.",
  hint:
    "[free] of VRAM stayed free: vram_threshold_percent [percent] would keep [blocks] more blocks on the GPU and save about [saved] [each]",
  each_step: "a step",
  each_pass: "a pass of the model",
  others: "[who] moved weights of this model during the run, which slows it. Remove or bypass that node",
  another: "another node",
  stopped: "The run ended before its first step finished",
  failed_run: "The run failed",
  out_of_vram: "There is too little VRAM: take fewer frames or a smaller size, or close other programs on the GPU",
  out_of_ram: "There is too little RAM: close other programs, or take a smaller file of the model",
  off: "This node passes through",
  foreign: "This node is that of [theirs], not that of [ours]. Remove one of the two folders and restart ComfyUI.",
  auto: "[name] (auto)",
  auto_chosen: "[name]: [number] (auto)",
  plan_text: "The plan appears here when this node runs.",
  report_text: "The report appears here when the sampler has finished.",
  size: "[number] [unit]",
  gb: "GB",
  mb: "MB",
  s: "s",
  ms: "ms",
};

const KEY = "wanVideoEnhancedBlockSwap";
const GB = 2 ** 30;
const MB = 2 ** 20;
// As in Python: a smaller share would be shown as 0.0 %.
const NEVER = 0.0005;

// How far a run has come that is over: in steps, or else in passes.
const OVER = { done: ["done_steps", "done_passes"], stopped: ["stopped_steps", "stopped_passes"] };

// Errors for which there is something to do.
const ERRORS = new Map([
  ["DeviceMemoryError", "out_of_vram"],
  ["OutOfVramError", "out_of_vram"],
  ["HostMemoryError", "out_of_ram"],
]);

const filled = (template, figures) =>
  template.replace(/\[(\w+)\]/g, (placeholder, name) => String(figures[name] ?? placeholder));

// In English, as Python has it: "1 step", "1 more block".
const singular = (text) =>
  text.replace(/\b1( more)? (block|step|other part|pass)(es|s)\b/g, (_, more = "", word) => `1${more} ${word}`);

// A number and its unit stay on one line.
const unbroken = (text) => text.replace(/(\d) (?=[KMG]?B\b|%|ms\b|s\b)/g, "$1\u00a0");

/** The texts of one language. */
export class Texts {
  /**
   * @param {string} language As in ComfyUI's setting.
   * @param {Record<string, string>} [translated] Missing words are in English.
   */
  constructor(language = "en", translated = {}) {
    this.language = language;
    this.words = { ...ENGLISH, ...translated };
    const one = { minimumFractionDigits: 1, maximumFractionDigits: 1 };
    this.decimal = new Intl.NumberFormat(language, one);
    this.whole = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
    this.percent = new Intl.NumberFormat(language, { ...one, style: "percent" });
    this.wholePercent = new Intl.NumberFormat(language, { maximumFractionDigits: 0, style: "percent" });
  }

  say(name, figures = {}) {
    return singular(filled(this.words[name], figures));
  }

  /** Memory, in powers of two; in the unit of `like` bytes, so that figures of one sum have one unit. */
  memory(bytes, like = bytes) {
    return like / MB < 1023.95 ? this.amount(bytes / MB, "mb") : this.amount(bytes / GB, "gb");
  }

  duration(ms) {
    return ms >= 1000 ? this.amount(ms / 1000, "s") : this.amount(ms, "ms", ms >= 100 ? this.whole : this.decimal);
  }

  amount(number, unit, format = this.decimal) {
    const size = this.say("size", { number: format.format(number), unit: this.words[unit] });
    return size.replace(" ", "\u00a0");
  }

  /** When an earlier run was: the time of the day, before today with the date. */
  earlier(at) {
    const [then, now] = [new Date(at), new Date()];
    const day = then.toDateString() === now.toDateString() ? {} : { month: "short", day: "numeric" };
    const time = { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...day };
    return this.say("earlier", { time: then.toLocaleString(this.language, time) });
  }

  /** The event's sentences, one per line; in English, Python's own text. */
  lines(event) {
    if (event.phase === "foreign") return [this.say("foreign", event)];
    const { before } = event;
    if (!before) return this.own(event);
    const [first, ...others] = this.own(event);
    const ofModel = ({ model }, text) => this.say("of_model", { model, text });
    return [ofModel(before, this.running(before)), ofModel(event, first), ...others];
  }

  /** Those of the model that runs now. */
  own(event) {
    if (event.phase === "off" && this.language !== "en") return [this.sentence(this.say("off")), ...split(event.text)];
    if (event.text && this.language === "en") return split(event.text);
    // An error's message is not translated.
    if (event.phase === "failed") {
      return [this.sentence(this.say(ERRORS.get(event.error) ?? "failed_run")), ...split(event.text)];
    }
    if (event.phase === "stopped" && !event.run) return [this.sentence(this.say("stopped"))];
    const { plan, adopt, run, hint, phase } = event;
    const isMeasured = phase in OVER && run?.stall_ms != null;
    const figures = [this.plan(plan, isMeasured), this.rescue(run), this.adopting(adopt), this.running(event)];
    const lines = [...figures, this.hint(hint), this.others(run)].filter(Boolean);
    return lines.length ? lines : split(event.text);
  }

  /** @param {boolean} isMeasured How long the GPU waited is known: what was expected is left out. */
  plan(plan, isMeasured) {
    if (!plan) return "";
    const { swapped, parts, over_ceiling: isOver } = plan;
    const blocks = this.say(swapped ? "plan" : "plan_all", { ...plan, stay: plan.blocks - swapped });
    const text = this.join("then", [
      swapped && parts ? this.say("plan_parts", { plan: blocks, parts }) : blocks,
      swapped && !isMeasured ? this.waits(plan, "waits_expected", "never_expected") : "",
      isOver ? this.say("over_ceiling") : "",
    ]);
    return this.sentence(text[0].toLocaleUpperCase(this.language) + text.slice(1));
  }

  /** What was done when VRAM ran out. */
  rescue(run) {
    if (run?.ran_out_with == null) return "";
    return this.sentence(this.say("ran_out", { blocks: run.ran_out_with }));
  }

  adopting(adopt) {
    if (!adopt) return "";
    const { placed, all } = adopt;
    return this.sentence(this.say("placing", { placed: this.memory(placed, all), all: this.memory(all) }));
  }

  running({ phase, plan, run }) {
    if (!run) return "";
    if (!run.passes) return this.sentence(this.say("first"));
    const isOver = phase in OVER;
    let head = this.head(run, phase);
    const waits = plan?.swapped ? this.waits(run, "waited", "never_waited") : "";
    const known = [this.takes(run), waits].filter(Boolean);
    if (known.length) head = this.say("details", { head, list: this.join("and", known) });
    return isOver ? this.say("done", { what: this.sentence(head) }) : this.sentence(head);
  }

  head({ passes, step, steps }, phase) {
    const [inSteps, inPasses] = OVER[phase] ?? [steps === null ? "step" : "step_of", "pass"];
    return step === null ? this.say(inPasses, { number: passes }) : this.say(inSteps, { number: step, steps });
  }

  /** How long a step takes. */
  takes({ each_ms: time, each }) {
    return time === null ? "" : this.say("takes", { time: this.duration(time), each: this.each(each) });
  }

  each(of) {
    return this.say(of === "pass" ? "each_pass" : "each_step");
  }

  /** What the user could change. */
  hint(hint) {
    if (!hint) return "";
    const [free, saved] = [this.memory(hint.free_bytes), this.duration(hint.saved_ms)];
    const figures = { ...hint, free, saved, each: this.each(hint.each) };
    return this.sentence(this.say("hint", figures));
  }

  /** What other nodes do to the weights; in English, Python's own text says more. */
  others(run) {
    if (!run?.others) return "";
    const who = this.join("and", run.movers.length ? run.movers : [this.say("another")]);
    return this.sentence(this.say("others", { who }));
  }

  /** How long the GPU waits for copies. */
  waits({ stall_ms: stall, forward_ms: forward }, some, never) {
    if (stall === null || !forward) return "";
    return stall / forward < NEVER ? this.say(never) : this.say(some, { share: this.percent.format(stall / forward) });
  }

  sentence(text) {
    return this.say("sentence", { text });
  }

  join(how, parts) {
    return parts.filter(Boolean).reduce((one, other) => this.say(how, { one, other }));
  }
}

const split = (text) => text.split("\n").filter(Boolean).map(unbroken);

/**
 * Our words from the translations of all packages in ComfyUI.
 * @param {object} languages The answer of ComfyUI's address for translations.
 * @param {string} language As in ComfyUI's setting; a language that we do not have is shown in English.
 */
export function textsFrom(languages, language) {
  const translated = languages?.[language]?.[KEY];
  return translated ? new Texts(language, translated) : new Texts();
}
