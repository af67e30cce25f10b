// The text as it grows: the prompt, then the completion in pieces that can be pointed at.

import { Alternatives } from "./alternatives.js";
import { TokenText } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

const MARGIN = 16; // pixels kept free below the newest line
const NEAR = 8; // pixels: browsers scroll by whole ones, and text has fractions of them

/** Nodes are only ever appended while a completion runs, and once a frame at most, so that long texts stay smooth. */
export class TextView {
  /** @type {Map<Element, Token[]>} the tokens of each piece */
  #tokens = new Map();
  #divider = new TokenText();
  /** @type {{text: string, tokens: Token[]}[]} came since the last frame */
  #came = [];
  #frame = 0;
  /** @type {Text | null} the newest piece's text */
  #newest = null;
  #completion = document.createElement("span");
  #prompt = "";

  /**
   * @param {HTMLElement} box where the text stands
   * @param {Alternatives} alternatives
   */
  constructor(box, alternatives) {
    this.box = box;
    this.alternatives = alternatives;
    this.#listen();
  }

  /** Prompt and completion, exactly. */
  get text() {
    this.flush();
    return this.#prompt + (this.#completion.textContent ?? "");
  }

  /** Whether there is any completion. */
  get hasCompletion() {
    return this.#came.length > 0 || this.#completion.hasChildNodes();
  }

  /**
   * A new text, of a prompt only.
   * @param {string} prompt
   */
  begin(prompt) {
    this.alternatives.hide();
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#came = [];
    this.#tokens.clear();
    this.#divider = new TokenText();
    this.#newest = null;
    this.#prompt = prompt;
    this.#completion = document.createElement("span");
    this.#completion.className = "completion running";
    const before = document.createElement("span");
    before.className = "prompt";
    before.textContent = prompt;
    this.box.replaceChildren(before, this.#completion);
    this.#follow();
  }

  /**
   * @param {string} text
   * @param {Token[]} tokens
   */
  add(text, tokens) {
    this.#came.push({ text, tokens });
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.flush());
  }

  /** Draws what has come. */
  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.#came.length) return;
    const follows = this.#below() <= NEAR;
    const made = document.createDocumentFragment();
    for (const { text, tokens } of this.#came) {
      for (const change of this.#divider.push(text, tokens)) {
        if (change.begins) made.append(this.#piece(change.text, change.tokens));
        else this.#grow(change.text, change.tokens);
      }
    }
    this.#came = [];
    this.#completion.append(made);
    // Who has scrolled away from the end is left in peace.
    if (follows) this.#follow();
  }

  /**
   * The completion has ended, one way or another.
   * @param {boolean} byModel whether the model ended it
   */
  end(byModel) {
    this.flush();
    const tokens = this.#divider.end();
    if (byModel && tokens.length) {
      const piece = this.#piece("", tokens);
      piece.classList.add("end");
      this.#completion.append(piece);
    }
    this.#completion.classList.remove("running");
  }

  /**
   * @param {string} text
   * @param {Token[]} tokens
   */
  #piece(text, tokens) {
    const piece = document.createElement("span");
    this.#newest = document.createTextNode(text);
    piece.append(this.#newest);
    this.#give(piece, tokens);
    if (/^\s*\n/.test(text)) piece.classList.add("line-end");
    return piece;
  }

  /**
   * @param {string} text
   * @param {Token[]} tokens
   */
  #grow(text, tokens) {
    const newest = this.#newest;
    if (!newest?.parentElement) throw new Error("nothing has begun that could grow");
    newest.appendData(text);
    this.#give(newest.parentElement, tokens);
  }

  /**
   * @param {Element} piece
   * @param {Token[]} tokens
   */
  #give(piece, tokens) {
    if (!tokens.length) return;
    const before = this.#tokens.get(piece);
    if (before) {
      before.push(...tokens);
      return;
    }
    // One piece at a time can be reached with Tab; the arrow keys go on from there.
    piece.setAttribute("tabindex", this.#tokens.size ? "-1" : "0");
    piece.classList.add("token");
    this.#tokens.set(piece, [...tokens]);
  }

  /** Brings the text's end onto the screen. */
  #follow() {
    scrollBy(0, Math.max(0, this.#below()));
  }

  /** Pixels by which the text's end lies below the screen. */
  #below() {
    return this.box.getBoundingClientRect().bottom + MARGIN - innerHeight;
  }

  /** @param {EventTarget | null} target */
  #pieceOf(target) {
    const piece = target instanceof Element ? target.closest(".token") : null;
    return piece instanceof HTMLElement && this.#tokens.has(piece) ? piece : null;
  }

  /** @param {HTMLElement} piece */
  #show(piece) {
    this.alternatives.show(piece, this.#tokens.get(piece) ?? []);
  }

  #listen() {
    const { box } = this;
    box.addEventListener("pointerover", (event) => {
      const piece = this.#pieceOf(event.target);
      if (event.pointerType === "mouse" && event.buttons === 0 && piece) this.#show(piece);
    });
    box.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return;
      const focused = this.#pieceOf(document.activeElement);
      if (focused) this.#show(focused);
      else this.alternatives.hide();
    });
    box.addEventListener("focusin", (event) => {
      const piece = this.#pieceOf(event.target);
      if (!piece) return;
      for (const other of box.querySelectorAll('.token[tabindex="0"]')) other.setAttribute("tabindex", "-1");
      piece.setAttribute("tabindex", "0");
      this.#show(piece);
    });
    box.addEventListener("focusout", () => this.alternatives.hide());
    // Some phones give no focus to what is tapped; and a tap elsewhere closes.
    document.addEventListener("click", (event) => {
      const piece = this.#pieceOf(event.target);
      if (piece) this.#show(piece);
      else if (!this.#pieceOf(document.activeElement)) this.alternatives.hide();
    });
    box.addEventListener("keydown", (event) => this.#move(event));
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const piece = this.#pieceOf(event.target);
    if (!piece || event.ctrlKey || event.metaKey || event.altKey) return;
    const forward = getComputedStyle(this.box).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const pieces = [...this.#tokens.keys()];
    const at = pieces.indexOf(piece);
    let to = at;
    if (event.key === "Home") to = 0;
    else if (event.key === "End") to = pieces.length - 1;
    else if (event.key === forward) to = Math.min(at + 1, pieces.length - 1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") to = Math.max(at - 1, 0);
    else return;
    event.preventDefault();
    /** @type {HTMLElement} */ (pieces[to]).focus();
  }
}
