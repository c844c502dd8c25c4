def check_data(config, workdir):
    raise NotImplementedError
