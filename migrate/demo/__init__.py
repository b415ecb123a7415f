"""`pymigrate demo`: the main job done once, before your eyes, with everything checked."""
