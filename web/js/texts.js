// Words and numbers in the language of the user interface. English is here; the other languages come from locales/.

// A figure is in square brackets, because the front end's own translations interpret braces, @ and |.
export const ENGLISH = {
  memory: "VRAM",
  idle: "The plan appears here when the sampler starts.",
  other: "other use",
  residents: "resident blocks",
  window: "window",
  headroom: "headroom",
  activations: "activations",
  ceiling: "ceiling",
  plan: "[free] free: [stay] of [blocks] blocks stay, [swapped] stream through [slots] slots",
  plan_all: "[free] free: all [blocks] blocks stay",
  over_ceiling: "[plan] (over the ceiling)",
  stall_expected: "[share] stall expected",
  no_stall_expected: "no stall expected",
  placing: "placing weights: [placed] of [all]",
  pinned: "[pinned] page-locked",
  first: "the first forward is under way",
  forward: "forward [number]",
  forwards: "[number] forwards",
  details: "[head]: [list]",
  streamed: "[amount] streamed",
  stall: "[share] stall",
  no_stall: "no stall",
  measuring: "being measured",
  and: "[one], [other]",
  stopped: "the run ended before its first forward finished",
  off: "nothing is swapped by this node",
  earlier: "of an earlier run",
  foreign: "This node is that of [theirs], not that of [ours]. Remove one of the two folders and restart ComfyUI.",
  size: "[number] [unit]",
  gib: "GiB",
  mib: "MiB",
  gb: "GB",
  mb: "MB",
  per_second: "[amount]/s",
};

const KEY = "wanVideoEnhancedBlockSwap";
const GIB = 2 ** 30;
const MIB = 2 ** 20;
// As in Python: a smaller stall would be shown as 0.0 %.
const NO_STALL = 0.0005;

const filled = (template, figures) =>
  template.replace(/\[(\w+)\]/g, (placeholder, name) => String(figures[name] ?? placeholder));

// A number and its unit stay on one line.
const unbroken = (text) => text.replace(/(\d) (?=[KMG]i?B\b|%)/g, "$1\u00a0");

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
    this.percent = new Intl.NumberFormat(language, { ...one, style: "percent" });
  }

  say(name, figures = {}) {
    return filled(this.words[name], figures);
  }

  /** Memory, in powers of two. */
  memory(bytes) {
    return bytes / MIB < 1023.95 ? this.amount(bytes / MIB, "mib") : this.amount(bytes / GIB, "gib");
  }

  /** Copied bytes, in powers of ten. */
  moved(bytes) {
    return bytes < 1e9 ? this.amount(bytes / 1e6, "mb") : this.amount(bytes / 1e9, "gb");
  }

  amount(number, unit) {
    const size = this.say("size", { number: this.decimal.format(number), unit: this.words[unit] });
    return size.replace(" ", "\u00a0");
  }

  /** The event's sentences, one per line; in English, Python's own text. */
  lines(event) {
    if (event.phase === "foreign") return [this.say("foreign", event)];
    if (event.phase === "off" && this.language !== "en") return [this.say("off"), ...split(event.text)];
    // The text of a stopped run may be an error's message, which is not translated.
    const isKnown = event.phase !== "stopped" || event.text === ENGLISH.stopped;
    if (event.text && (this.language === "en" || !isKnown)) return split(event.text);
    if (event.phase === "stopped") return [this.say("stopped")];
    const figures = [this.plan(event.plan), this.adopting(event.adopt), this.running(event)];
    const lines = [...figures, event.run?.others].filter(Boolean); // what others do is told in English alone
    return lines.length ? lines : split(event.text);
  }

  plan(plan) {
    if (!plan) return "";
    const figures = { ...plan, free: this.memory(plan.free), stay: plan.blocks - plan.swapped };
    const expected = plan.swapped ? this.stall(plan, "stall_expected", "no_stall_expected") : "";
    const text = this.list([this.say(plan.swapped ? "plan" : "plan_all", figures), expected]);
    return plan.over_ceiling ? this.say("over_ceiling", { plan: text }) : text;
  }

  adopting(adopt) {
    if (!adopt) return "";
    const placing = this.say("placing", { placed: this.memory(adopt.placed), all: this.memory(adopt.all) });
    return this.list([placing, adopt.pinned ? this.say("pinned", { pinned: this.memory(adopt.pinned) }) : ""]);
  }

  running({ phase, plan, run }) {
    if (!run) return "";
    if (!run.forwards) return this.say("first");
    const isOver = phase === "done";
    const head = this.say(isOver ? "forwards" : "forward", { number: run.forwards });
    if (!plan?.swapped) return head;
    const speed = run.copy_bytes_per_s;
    const list = this.list([
      this.say("streamed", { amount: this.moved(run.streamed) }),
      this.stall(run, "stall", "no_stall") || (isOver ? "" : this.say("measuring")),
      speed === null ? "" : this.say("per_second", { amount: this.moved(speed) }),
    ]);
    return this.say("details", { head, list });
  }

  stall({ stall_ms: stall, forward_ms: forward }, some, none) {
    if (stall === null || !forward) return "";
    return stall / forward < NO_STALL ? this.say(none) : this.say(some, { share: this.percent.format(stall / forward) });
  }

  list(parts) {
    return parts.filter(Boolean).reduce((one, other) => this.say("and", { one, other }));
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
