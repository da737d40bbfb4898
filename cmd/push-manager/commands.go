package main

import (
	"context"
	"strconv"

	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/program"
)

// serve is Push-Manager as a command.
func serve() program.Command {
	return program.Command{Name: "serve", Help: "Serve the push API. Needs no name.", File: true, New: func() program.Settings { return &Config{} }}
}

// startIn starts Push-Manager in a stack: with the defaults, wherever the stack says
// nothing else.
func startIn(ctx context.Context, place devstack.Place) (devstack.PushManager, error) {
	var c Config
	err := program.Fill(&c, map[string]string{
		"GRPC_PORT": strconv.Itoa(place.GRPCPort), "METRICS_PORT": strconv.Itoa(place.MetricsPort),
		"ETCD_ENDPOINTS": place.EtcdEndpoint, "CONTROLLER_ADDRESS": place.ControllerAddress,
		"DRAIN_NOTICE": "0s", // there is no balancer
	})
	if err != nil {
		return nil, err
	}
	place.Tracing.Service, place.Tracing.Instance = c.Tracing.Service, c.Tracing.Instance
	c.Tracing = place.Tracing
	m, err := start(ctx, c, place.Logger)
	if err != nil {
		return nil, err
	}
	return m, nil
}
