// One completion from the request to its end: what is measured on the way, and how it ended.

import { ServerError, complete } from "./client.js";

/** @typedef {import("./tokens.js").Token} Token */

/**
 * @typedef {object} Ending
 * @property {"stop" | "length" | "stopped" | "failed"} how "stopped": by the person
 * @property {unknown} error if it failed
 * @property {number} written tokens
 * @property {number | null} read tokens of the prompt, where the server said so
 */

export class Run {
  #abort = new AbortController();
  #firstAt = 0;
  #lastAt = 0;
  #count = 0;

  /** @param {(text: string, tokens: Token[]) => void} receive */
  constructor(receive) {
    this.receive = receive;
  }

  /** Tokens written until now. */
  get count() {
    return this.#count;
  }

  /** Tokens per second since the first, or null while that means nothing. */
  get rate() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return this.#count > 1 && seconds > 0 ? (this.#count - 1) / seconds : null;
  }

  stop() {
    this.#abort.abort();
  }

  /**
   * @param {object} request
   * @param {string} key
   * @returns {Promise<Ending>}
   */
  async go(request, key) {
    /** @type {Ending} */
    const ending = { how: "failed", error: null, written: 0, read: null };
    /** @type {string | null} */
    let reason = null;
    try {
      for await (const piece of complete(request, key, this.#abort.signal)) {
        this.#clock(piece.tokens.length || (piece.text ? 1 : 0));
        this.receive(piece.text, piece.tokens);
        reason = piece.finishReason ?? reason;
        if (piece.usage) {
          ending.read = piece.usage.prompt_tokens;
          this.#count = piece.usage.completion_tokens;
        }
      }
      if (reason === "stop" || reason === "length") ending.how = reason;
      else ending.error = new ServerError(200, "it ended the completion without saying why.");
    } catch (error) {
      if (this.#abort.signal.aborted) ending.how = "stopped";
      else ending.error = error;
    }
    ending.written = this.#count;
    return ending;
  }

  /** @param {number} tokens that have just come */
  #clock(tokens) {
    if (!tokens) return;
    this.#lastAt = performance.now();
    if (!this.#count) this.#firstAt = this.#lastAt;
    this.#count += tokens;
  }
}
