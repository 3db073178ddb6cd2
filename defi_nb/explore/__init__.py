"The workbench: one object that shows a policy at every moment of an episode."
