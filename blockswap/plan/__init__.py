"""What is decided: budget, schedule, plan; pure arithmetic."""
