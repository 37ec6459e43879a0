"""Who teaches: signals and their routes, the student itself, servers, sampled completions."""
