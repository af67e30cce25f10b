// Which part of the text belongs to which token.
//
// The text is the truth and is shown as the server sends it. Tokens come beside it, each with the place in the text where
// it begins, counted in code points. A token may hold part of a character, and text that may be the beginning of a stop string
// comes later than its tokens; so text is divided at the tokens' places when it arrives, never put together from tokens.

/**
 * @typedef {object} Token
 * @property {string} text as the server names it; bytes that are no character look like "bytes:\\xe2\\x80"
 * @property {number | null} logprob natural logarithm of its probability
 * @property {[string, number][]} top likely tokens there with theirs, the likeliest first
 * @property {number} offset code points of the completion before it
 */

/**
 * @typedef {object} Change
 * @property {boolean} begins whether a new piece begins; else the newest grows
 * @property {string} text to be appended
 * @property {Token[]} tokens that belong to the piece from now on
 */

const CHARACTERS = new Intl.Segmenter(undefined, { granularity: "grapheme" });
// So much of a piece tells whether what follows is still the same character as read by people.
const LOOK_BACK = 64;

/**
 * Whether `next` begins a new character after `before`: accents, joined emoji and flags must not be torn apart.
 * @param {string} before
 * @param {string} next not empty
 */
function startsCharacter(before, next) {
  if (!before) return true;
  const segment = CHARACTERS.segment(before + next).containing(before.length);
  return segment?.index === before.length;
}

/** Divides a completion's text into pieces, each with the tokens that made it. */
export class TokenText {
  #position = 0;
  #last = "";
  #begun = false;
  /** @type {Token[]} */
  #waiting = [];

  /**
   * @param {string} text what comes next
   * @param {Token[]} tokens what comes with it; their text may follow later
   * @returns {Change[]}
   */
  push(text, tokens) {
    this.#waiting.push(...tokens);
    /** @type {Change[]} */
    const changes = [];
    const points = Array.from(text);
    while (points.length) {
      const due = this.#takeDue();
      const next = this.#waiting.length ? this.#waiting[0].offset - this.#position : points.length;
      const taken = points.splice(0, next);
      const piece = taken.join("");
      this.#position += taken.length;
      const begins = !this.#begun || (due.length > 0 && startsCharacter(this.#last, piece));
      this.#begun = true;
      this.#last = ((begins ? "" : this.#last) + piece).slice(-LOOK_BACK);
      changes.push({ begins, text: piece, tokens: due });
    }
    return changes;
  }

  /**
   * Tokens that no text has come for: the end-of-text that ended the completion.
   * @returns {Token[]}
   */
  end() {
    return this.#waiting.splice(0);
  }

  /** Tokens that begin at or before the present place. */
  #takeDue() {
    let n = 0;
    while (n < this.#waiting.length && this.#waiting[n].offset <= this.#position) n += 1;
    return this.#waiting.splice(0, n);
  }
}

/**
 * The tokens of one piece of a stream.
 * @param {any} logprobs OpenAI's object of lists, or null
 * @returns {Token[]}
 */
export function toTokens(logprobs) {
  if (!logprobs) return [];
  return logprobs.tokens.map((/** @type {string} */ text, /** @type {number} */ i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => Number(b[1]) - Number(a[1])),
    offset: logprobs.text_offset[i],
  }));
}

/**
 * A token's text with everything in it to be seen.
 * @param {string} text as the server names it
 * @returns {string}
 */
export function visible(text) {
  if (text === "") return "(nothing)";
  const bytes = /^bytes:((?:\\x[0-9a-fA-F]{2})+)$/.exec(text);
  if (bytes) return bytes[1];
  /** @type {Record<string, string>} */
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥" };
  return text.replace(/[\p{Z}\p{C}]/gu, (c) => {
    // A joiner of emoji is to be seen only where there is nothing to join.
    if (c === "\u200d" && text.length > 1) return c;
    return signs[c] ?? `\\u{${(c.codePointAt(0) ?? 0).toString(16)}}`;
  });
}

/**
 * @param {number | null} logprob
 * @returns {string} a probability for people
 */
export function percent(logprob) {
  if (logprob === null) return "";
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "< 0.01%";
  return `${share.toFixed(share < 1 ? 2 : share < 99.95 ? 1 : 0)}%`;
}
