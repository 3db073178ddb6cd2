"Policies over the wire, and robots that use them."
