"""Queue, batch maker and policy. All of it runs on the engine side; HTTP never sees a batch."""
