"""The research on top of the recipes: grids of runs (`suites`), their training (`compare`), what they are to decide
(`claims`), verdicts (`statistics`) and pages (`report`); `mixture` shows the loss in the plane."""
