"""Where rows come from: one module a layout, each with a `Source`."""
