// The text on the plan and report nodes: what they have said last, to read, scroll and copy.

import { GROUND, TEXT } from "./memory_bar.js";

const LINE = 17;
const LINES = 12;
const PADDING = 8;

/** Height that shows all lines of a report. */
export const TEXT_HEIGHT = LINES * LINE + 2 * PADDING;

/** A read-only field. */
export function textField() {
  const field = document.createElement("textarea");
  field.readOnly = true;
  field.spellcheck = false;
  Object.assign(field.style, {
    boxSizing: "border-box",
    width: "100%",
    height: "100%",
    minHeight: `${TEXT_HEIGHT}px`,
    padding: `${PADDING}px 10px`,
    border: "none",
    outline: "none",
    borderRadius: "8px",
    resize: "none",
    background: GROUND,
    color: TEXT,
    font: `12px/${LINE}px Inter, system-ui, sans-serif`,
  });
  return field;
}

/** Shows what the node has said, or paler what it said in an earlier run, or what will be there. */
export function showText(field, text, isNew) {
  field.value = text;
  field.style.opacity = isNew ? "1" : "0.7";
}
