"""How WaveCore learns: recorded episodes, nested schedules, and the proof that it learned."""
