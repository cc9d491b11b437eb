"""Names of the stages of a curation, in the order in which they are run; a stage uses the tables of those before it."""

STAGES = ("filter", "duplicates", "features", "centres", "assign", "select", "caption", "build")
