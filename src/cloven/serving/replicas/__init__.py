"""Several trusted processes behind one endpoint: replicas of a served model as Ray actors, in one zone of trust."""
