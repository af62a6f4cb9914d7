"""What the trainings share: checkpoints that survive a kill, borrowed models, a guard against collapse."""
