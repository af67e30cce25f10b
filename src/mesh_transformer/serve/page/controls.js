// The settings: each slider with its number field, the seed, and what they hold together.

import { DEFAULTS, SEED, SLIDERS, drawSeed, fit } from "./options.js";

/** @typedef {import("./options.js").Options} Options */
/** @typedef {import("./options.js").Range} Range */

/**
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element "${id}"`);
  return found;
}

/**
 * @param {string} id
 * @returns {HTMLInputElement}
 */
export const input = (id) => /** @type {HTMLInputElement} */ (byId(id));

/**
 * What a field holds, if that is a value of its range.
 * @param {Range} range
 * @param {HTMLInputElement} field
 * @returns {number | null}
 */
function read(range, field) {
  const value = field.valueAsNumber;
  return Number.isFinite(value) && fit(range, value) === value ? value : null;
}

/** A slider and a number field that always say the same. */
class Slider {
  /**
   * @param {Range} range
   * @param {(value: number) => void} onChange
   */
  constructor(range, onChange) {
    this.range = range;
    const { name, label, hint } = range;
    this.element = document.createElement("div");
    this.element.className = "option";
    const title = document.createElement("label");
    title.htmlFor = name;
    title.textContent = label;
    this.number = this.#field("number", name);
    this.number.inputMode = range.step < 1 ? "decimal" : "numeric";
    this.slider = this.#field("range", `${name}-slider`);
    this.slider.setAttribute("aria-label", `${label}, slider`);
    const about = document.createElement("p");
    about.className = "hint";
    about.id = `${name}-hint`;
    about.textContent = hint;
    for (const field of [this.number, this.slider]) field.setAttribute("aria-describedby", about.id);
    this.element.append(title, this.number, this.slider, about);

    this.slider.addEventListener("input", () => onChange(this.slider.valueAsNumber));
    follow(range, this.number, onChange);
  }

  /**
   * @param {"number" | "range"} type
   * @param {string} id
   */
  #field(type, id) {
    const field = document.createElement("input");
    field.type = type;
    field.id = id;
    field.min = String(this.range.min);
    field.max = String(this.range.max);
    field.step = String(this.range.step);
    return field;
  }

  /** @param {number} value */
  set(value) {
    this.slider.valueAsNumber = value;
    put(this.number, value);
  }
}

/**
 * A number field tells of every usable value while it is typed, and is made right when it is left.
 * @param {Range} range
 * @param {HTMLInputElement} field
 * @param {(value: number) => void} onChange
 */
function follow(range, field, onChange) {
  field.addEventListener("input", () => {
    const value = read(range, field);
    field.setAttribute("aria-invalid", String(value === null));
    if (value !== null) onChange(value);
  });
  field.addEventListener("change", () => {
    field.setAttribute("aria-invalid", "false");
    const value = field.valueAsNumber;
    onChange(Number.isFinite(value) ? fit(range, value) : DEFAULTS[range.name]);
  });
}

/**
 * Writes a field unless it says so already: "0." must not become "0" under the person's hands.
 * @param {HTMLInputElement} field
 * @param {number} value
 */
function put(field, value) {
  if (field.valueAsNumber !== value) field.value = String(value);
}

export class Controls {
  /** @type {Options} */
  #options = { ...DEFAULTS };

  /** @param {() => void} onChange something has been set by hand */
  constructor(onChange) {
    this.onChange = onChange;
    this.sliders = SLIDERS.map((range) => new Slider(range, (value) => this.#change({ [range.name]: value })));
    byId("options").append(...this.sliders.map((slider) => slider.element));
    follow(SEED, input("seed"), (seed) => this.#change({ seed, random: false }));
    byId("new-seed").addEventListener("click", () => this.#change({ seed: drawSeed() }));
    byId("random").addEventListener("change", () => this.#change({ random: input("random").checked }));
    byId("reset").addEventListener("click", () => this.#change(DEFAULTS));
  }

  /** @returns {Options} */
  get options() {
    return { ...this.#options };
  }

  /** @param {Options} options */
  set options(options) {
    this.#options = { ...options };
    for (const slider of this.sliders) slider.set(options[slider.range.name]);
    put(input("seed"), options.seed);
    input("random").checked = options.random;
  }

  /** Draws the next run's seed, if each run is to have its own. */
  nextSeed() {
    if (this.#options.random) this.options = { ...this.#options, seed: drawSeed() };
  }

  /** @param {Partial<Options>} changed */
  #change(changed) {
    this.options = { ...this.#options, ...changed };
    this.onChange();
  }
}
