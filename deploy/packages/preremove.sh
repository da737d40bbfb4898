#!/bin/sh
# "remove" is what dpkg says, 0 what rpm says. An upgrade leaves services running: each is restarted by its owner, one after
# the other.
set -e
case "$1" in
  remove | 0)
    if [ -d /run/systemd/system ]; then
      systemctl --no-reload disable --now push-manager.service push-manager-controller.service push-manager-connect-node.service
    fi
    ;;
esac
