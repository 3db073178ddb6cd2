"The method: encoders, GFDM, GIDM, action adapter, policies."
