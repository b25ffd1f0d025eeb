"""One model into another: edits that change shapes, each with a record that a loader can replay."""
