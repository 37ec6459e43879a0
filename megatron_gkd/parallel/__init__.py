"""Process layouts, collectives and vocabulary shards."""
