package pushmanager

import (
	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/plain"
)

// bindAudit is the section audit.
func bindAudit(c *audit.Config, s *config.Set) {
	s.Text(&c.File, "audit.file", "", "File that refusals, broadcasts and reloads are written to, one line of JSON each. SIGHUP has it opened again. -: standard output. Empty: nothing is written.")
	s.Float(&c.AllowedSample, "audit.allowed_sample", 0, 0, 1, "Share of the pushes that are written although they were let in. Broadcasts always are.")
	s.Bool(&c.HashIDs, "audit.hash_ids", false, "Write the SHA-256 of ids of users and rooms in their place.")
}

// openAudit opens the audit log, if there is one, and has it told of certificates.
func (m *PushManager) openAudit(cfg *Config) (err error) {
	if cfg.Audit.File == "" {
		return nil
	}
	if m.audit, err = audit.Open(cfg.Audit); err != nil {
		return err
	}
	m.life.Add("audit log", app.WithGrace(m.audit.Close))
	cfg.Ingress.Audit = m.audit
	for _, c := range []*app.Certificates{&cfg.TLS.Certificates, &cfg.LinkTLS.Certificates, &cfg.ControllerTLS.Certificates, &cfg.Etcd.TLS, &cfg.Store.Files} {
		c.OnReload = func(role string, err error) { auditReload(m.audit, audit.TLSReloaded, role, err) }
	}
	return nil
}

// auditReload says that files were read again. log may be nil.
func auditReload(log *audit.Log, event, what string, err error) {
	if log == nil {
		return
	}
	e := audit.Entry{Event: event, TargetKind: what, Outcome: "ok"}
	if err != nil {
		e.Outcome, e.Reason = "failed", plain.Line(err.Error(), 300)
	}
	log.Write(e)
}
