from fake_process import worker

worker("decode")
