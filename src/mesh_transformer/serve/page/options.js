// What may be set, in which ranges, and how it is written into a link.

/**
 * @typedef {object} Options
 * @property {number} temperature
 * @property {number} top_p
 * @property {number} top_k 0 switches it off
 * @property {number} max_tokens
 * @property {number} seed
 * @property {boolean} random whether every run draws a seed of its own
 */

/**
 * @typedef {object} Range
 * @property {"temperature"|"top_p"|"top_k"|"max_tokens"|"seed"} name as the server calls it
 * @property {string} key its name in a link
 * @property {string} label
 * @property {string} hint
 * @property {number} min
 * @property {number} max
 * @property {number} step
 */

/** @type {Range[]} */
export const SLIDERS = [
  { name: "temperature", key: "t", label: "Temperature", hint: "0 always takes the likeliest", min: 0, max: 2, step: 0.01 },
  { name: "top_p", key: "tp", label: "Top p", hint: "likeliest tokens that make up this share", min: 0, max: 1, step: 0.01 },
  { name: "top_k", key: "tk", label: "Top k", hint: "this many of the likeliest; 0 is off", min: 0, max: 200, step: 1 },
  { name: "max_tokens", key: "n", label: "Length", hint: "at most this many tokens", min: 1, max: 1024, step: 1 },
];

/** @type {Range} */
export const SEED = { name: "seed", key: "s", label: "Seed", hint: "", min: 0, max: 2 ** 32 - 1, step: 1 };

/** @type {Readonly<Options>} */
export const DEFAULTS = Object.freeze({ temperature: 0.8, top_p: 0.95, top_k: 0, max_tokens: 128, seed: 0, random: true });

/** @returns {number} a seed that nobody chose */
export function drawSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/**
 * The nearest value that the range has.
 * @param {Range} range
 * @param {number} value any finite number
 * @returns {number}
 */
export function fit(range, value) {
  const inside = Math.min(range.max, Math.max(range.min, value));
  return Number((Math.round(inside / range.step) * range.step).toFixed(2));
}

/**
 * The fragment of a link: the prompt and every option.
 * @param {string} prompt
 * @param {Options} options
 * @returns {string} without the #
 */
export function toFragment(prompt, options) {
  const fields = new URLSearchParams({ p: prompt });
  for (const range of [...SLIDERS, SEED]) fields.set(range.key, String(options[range.name]));
  if (options.random) fields.set("r", "1");
  return fields.toString();
}

/**
 * Reads a link's fragment; what it does not hold has its default.
 * @param {string} fragment with or without the #
 * @returns {{prompt: string, options: Options, problems: string[]}} problems: what was not usable, in words
 */
export function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  /** @type {Options} */
  const options = { ...DEFAULTS };
  /** @type {string[]} */
  const problems = [];
  for (const range of [...SLIDERS, SEED]) {
    const written = fields.get(range.key);
    if (written === null) continue;
    const value = written.trim() === "" ? NaN : Number(written);
    if (!Number.isFinite(value)) {
      problems.push(`${range.label} "${written.slice(0, 20)}" is no number; ${options[range.name]} is used.`);
      continue;
    }
    options[range.name] = fit(range, value);
    if (value < range.min || value > range.max) {
      problems.push(`${range.label} ${value} is not in ${range.min} to ${range.max}; ${options[range.name]} is used.`);
    }
  }
  // A link that names a seed means that very seed, unless it says otherwise.
  options.random = fields.has("r") ? fields.get("r") === "1" : !fields.has(SEED.key);
  return { prompt: fields.get("p") ?? "", options, problems };
}

/**
 * The body of a request for a completion.
 * @param {string} prompt
 * @param {Options} options
 * @param {string | null} model its name, where it is known
 */
export function toRequest(prompt, options, model) {
  const { random: _, ...sampling } = options;
  return {
    ...(model === null ? {} : { model }),
    prompt,
    ...sampling,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: 5,
  };
}
