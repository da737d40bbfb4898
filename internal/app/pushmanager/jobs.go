package pushmanager

import (
	"errors"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/jobs"
	"github.com/push-manager/push-manager/transport/link"
)

// jobsConfig is the settings of broadcast jobs.
type jobsConfig struct {
	jobs.Config

	On bool
}

func (c *jobsConfig) bind(s *config.Set) {
	s.Bool(&c.On, "jobs", true, "Serve broadcast jobs, and run those of all instances. Off: this instance does neither.")
	s.Int(&c.MaxRate, "jobs_max_rate", jobs.Defaults().MaxRate, 1, 100_000, "Users a second that a broadcast job may be made for.")
}

// openJobs makes what runs broadcast jobs. It looks at etcd when it is started.
func (m *PushManager) openJobs(cfg *Config) (err error) {
	c := &cfg.Jobs
	if !c.On {
		return nil
	}
	c.Client, c.Engine, c.Nodes = cfg.Discovery.Client, m.engine, m.links
	c.NoList = func(err error) bool { return errors.Is(err, link.ErrNoList) }
	c.Ready = func() bool { return m.ingress.Serving() } // there is one when jobs are started
	if m.jobs, err = jobs.New(c.Config); err != nil {
		return err
	}
	m.life.Add("jobs", m.jobs.Close)
	cfg.Ingress.Jobs = m.jobs
	return nil
}
