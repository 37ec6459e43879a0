"""Kinds of teacher: signals and their routes, the student as its own teacher, teacher servers, sampled completions."""
