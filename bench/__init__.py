"Our training steps against the libraries that people would use instead; duel.py says how"
