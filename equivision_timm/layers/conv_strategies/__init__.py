"""One exact algorithm a file, each a pure function (input, coefficients, basis) -> output; `expand` defines it."""
