"""The functional layers of the transformer: `(parameters, activations) -> activations`."""
