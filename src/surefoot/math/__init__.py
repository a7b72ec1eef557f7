"""Pure functions, jax arrays in, jax arrays out: no classes, no configuration, no environment, no input or output."""
