"""The merge methods: functions from the parents' values at every kind of position to the merged value. docs/merging.md tells of all choices."""
