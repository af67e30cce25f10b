// Prompts to begin with. The model only goes on with a text, so each is the beginning of one.

/** @type {{name: string, prompt: string}[]} */
export const EXAMPLES = [
  {
    name: "Geese",
    prompt:
      "Every autumn the geese came back to the lake behind the lighthouse, and every autumn the keeper counted them. " +
      "This year there was one too many.",
  },
  {
    name: "Questions",
    prompt:
      "Each question is answered in one sentence.\n\n" +
      "Question: Which planet is the largest?\nAnswer: The largest planet of the solar system is Jupiter.\n\n" +
      "Question: What do bees make honey from?\nAnswer: Bees make honey from the nectar of flowers.\n\n" +
      "Question: Why does ice float on water?\nAnswer:",
  },
  {
    name: "Arithmetic",
    prompt: "12 + 7 = 19\n48 - 13 = 35\n6 * 9 = 54\n80 / 5 = 16\n27 + 15 =",
  },
  {
    name: "Proof",
    prompt: "Theorem. The sum of two odd integers is even.\n\nProof. Let m and n be odd integers. Then",
  },
  {
    name: "Python",
    prompt:
      "def median(values):\n" +
      '    """Returns the middle one of some numbers, or the mean of the two in the middle.\n\n' +
      "    >>> median([3, 1, 2])\n    2\n" +
      '    """\n',
  },
  {
    name: "Translation",
    prompt:
      "English: The train leaves at nine.\nFrench: Le train part à neuf heures.\n\n" +
      "English: My sister lives near the harbour.\nFrench: Ma sœur habite près du port.\n\n" +
      "English: Where can I buy fresh bread?\nFrench:",
  },
];
