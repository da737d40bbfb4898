package pushmanager

import (
	"fmt"
	"time"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/health"
)

// watchHealth begins to look whether pushes can be delivered. Nothing here refuses a
// push: where all instances are not ready for one reason, a balancer that fails open
// still gets its callers the true answer.
func (m *PushManager) watchHealth(cfg Config) (err error) {
	cfg.Health.OnChange = m.ingress.SetHealthy
	cfg.Health.Checks = []health.Check{
		{Name: "discovery", Why: m.nodesUnknown},
		{Name: "nodes", Why: m.nodesUnreachable},
		{Name: "controller", Why: func() string { return m.controllerAway(cfg.Routes.StaleTTL) }},
	}
	if m.health, err = health.New(cfg.Health); err != nil {
		return err
	}
	m.health.Start()
	m.life.Add("readiness", app.Closing(m.health.Close))
	return nil
}

// nodesUnknown: etcd that goes away later changes nothing, the nodes known stay.
func (m *PushManager) nodesUnknown() string {
	if m.ingress.Serving() {
		return ""
	}
	why := "discovery: nodes not known yet, etcd has not answered"
	if cause := m.watcher.Why(); cause != "" {
		why += ": " + cause
	}
	return why
}

func (m *PushManager) nodesUnreachable() string {
	if !m.ingress.Serving() {
		return ""
	}
	s := m.links.Stats()
	switch {
	case s.Able > 0:
		return ""
	case s.Reachable > 0:
		return fmt.Sprintf("no reachable node: %d registered, %d reachable, all of them stalled or draining", s.Nodes, s.Reachable)
	default:
		return fmt.Sprintf("no reachable node: %d registered, 0 reachable", s.Nodes)
	}
}

// controllerAway: for a while, what is cached serves without the Controller.
func (m *PushManager) controllerAway(served time.Duration) string {
	away, contacted, trouble := m.controller.Away()
	if contacted && away <= served {
		return ""
	}
	why := "controller: has not answered yet"
	if contacted {
		why = fmt.Sprintf("controller: away for %v", away.Round(time.Second))
	}
	if trouble != "" {
		why += ": " + trouble
	}
	return why
}
