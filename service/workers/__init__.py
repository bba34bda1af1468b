"""The engine side of the service and the messages that cross to it."""
