"""The HTTP endpoints: each route reads a request with a codec, runs it and writes the answer. No tensor work of their
own."""
