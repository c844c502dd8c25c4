def prepare(config, workdir):
    raise NotImplementedError
