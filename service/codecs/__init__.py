"""HTTP bytes to tensors and back: one file per kind of content. Codecs know no routes and no queues."""
