"Simulators that are not ours: calvin_env, SimplerEnv, LIBERO."
