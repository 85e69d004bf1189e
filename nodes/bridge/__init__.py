"""The one room that imports the host's internals: it turns the engine's parts into the host's types and back."""
