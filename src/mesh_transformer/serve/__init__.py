"""The HTTP server: OpenAI's completions protocol, the original's two, and the page, in front of the engine."""
