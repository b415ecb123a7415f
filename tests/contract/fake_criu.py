#!/usr/bin/python3
"""A criu that speaks swrk and does what the JSON list in $FAKE_CRIU says, for each request it gets."""

import importlib.util
import json
import os
import signal
import socket
import sys
import time

spec = importlib.util.spec_from_file_location("rpc_pb2", os.environ["FAKE_CRIU_MESSAGES"])
rpc = importlib.util.module_from_spec(spec)
sys.path.insert(0, os.environ["FAKE_CRIU_PROTOBUF"])
spec.loader.exec_module(rpc)
sock = socket.socket(fileno=int(sys.argv[2]))
request = rpc.criu_req()
request.ParseFromString(sock.recv(1 << 20))
for action, *arguments in json.loads(os.environ["FAKE_CRIU"]):
    answer = rpc.criu_resp()
    answer.type = request.type
    answer.success = True
    if action == "notify":
        answer.type = rpc.NOTIFY
        answer.notify.script, answer.notify.pid = arguments
        sock.send(answer.SerializeToString())
        reply = rpc.criu_req()
        reply.ParseFromString(sock.recv(1 << 20))
        if not reply.notify_success:
            answer = rpc.criu_resp(type=request.type, success=False)
            sock.send(answer.SerializeToString())
            break
    elif action == "log":
        opts = request.opts
        number = opts.work_dir_fd if opts.HasField("work_dir_fd") else opts.images_dir_fd
        directory = f"/proc/{os.getppid()}/fd/{number}"
        with open(f"{directory}/{request.opts.log_file}", "a") as file:
            file.write("\n".join(arguments) + "\n")
    elif action == "succeed":
        sock.send(answer.SerializeToString())
    elif action == "version":
        answer.version.major_number, answer.version.minor_number, answer.version.sublevel = arguments
        sock.send(answer.SerializeToString())
    elif action == "fail":
        answer.success, answer.cr_errno = False, arguments[0]
        sock.send(answer.SerializeToString())
    elif action == "type":
        answer.type = arguments[0]
        sock.send(answer.SerializeToString())
    elif action == "garbage":
        sock.send(b"\xff" * 7)
    elif action == "exit":
        os._exit(arguments[0])
    elif action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(60)
