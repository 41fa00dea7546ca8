"""How a student is trained: parameter groups, schedule, the ZeRO engine and its checkpoints."""
