// The page's address: it holds the prompt and every setting, and opening it sets them again. Nothing runs by itself.

import { fromFragment, toFragment } from "./options.js";

/** @typedef {import("./options.js").Options} Options */

const WAIT = 250; // milliseconds without a change; browsers refuse addresses that change too often

export class Link {
  #timer = 0;

  /** @param {() => {prompt: string, options: Options}} state what the address shall hold */
  constructor(state) {
    this.state = state;
    addEventListener("pagehide", () => this.write());
  }

  /** What the address holds, or null if it says nothing. */
  read() {
    return location.hash.length > 1 ? fromFragment(location.hash) : null;
  }

  /** Something has changed; the address follows soon. */
  follow() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.write(), WAIT);
  }

  /** Brings the address up to date. */
  write() {
    clearTimeout(this.#timer);
    const { prompt, options } = this.state();
    history.replaceState(null, "", `#${toFragment(prompt, options)}`);
  }

  /** Makes what is there now a step of the browser's history, so that its Back button brings it back. */
  keep() {
    this.write();
    history.pushState(null, "", location.href);
  }

  /**
   * For somebody else: with the seed as it stands, so that they get the same text.
   * @returns {string}
   */
  toShare() {
    this.write();
    const { prompt, options } = this.state();
    return new URL(`#${toFragment(prompt, { ...options, random: false })}`, location.href).href;
  }
}
